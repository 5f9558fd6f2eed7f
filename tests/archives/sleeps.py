"""Takes 5 ms per request and no CPU time: what a machine can serve of it does not depend on the machine."""

import time

from mms.handler import Handler


class Sleeps(Handler):
    def inference(self, batch):
        time.sleep(0.005 * len(batch))
        return ["ok"] * len(batch)
