"""The edge: renders nginx's configuration, has nginx check it, runs it and watches over it."""

from mms_nginx.find import edge_user, find_nginx
from mms_nginx.render import Listener, render
from mms_nginx.run import Nginx

__all__ = ["Listener", "Nginx", "edge_user", "find_nginx", "render"]
