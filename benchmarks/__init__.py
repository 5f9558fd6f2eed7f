"""What a request costs: our server beside nginx's `return 200` and other floors, on this machine."""
