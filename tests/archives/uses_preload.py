"""Answers whether a module was there before the handler was imported: then its fork server has imported it."""

import sys

from mms.handler import Handler

PRELOADED = "colorsys" in sys.modules


class Preloaded(Handler):
    def inference(self, batch):
        return [str(PRELOADED)] * len(batch)
