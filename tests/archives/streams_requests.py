"""Request style: `inference` yields the words of each body in turn, upper case, and None where a body has no more.

A word that is a path (with a slash in it) is waited for; `raise` raises, `refuse` is refused by postprocess, and for
`thread` there comes the name of the thread that the step runs in.
"""

import os
import threading

from mms.handler import Handler, PredictionError, Response


class Words(Handler):
    def preprocess(self, request):
        return request.text().split()

    def inference(self, batch):
        for step in range(max(map(len, batch))):
            yield [self._word(words[step]) if step < len(words) else None for words in batch]

    def postprocess(self, output):
        if output == "REFUSE":
            raise PredictionError("not this word", 422)
        return Response(output, headers={"x-kind": "words"})

    def _word(self, word):
        if word == "thread":
            return threading.current_thread().name
        if word == "raise":
            raise ValueError("a bad word")
        if "/" in word:
            while not os.path.exists(word):
                threading.Event().wait(0.002)
        return word.upper()
