"""Prompts that load the demo model's experts in two ways: as prose does and as code does."""

from __future__ import annotations

PROSE = (
    'The "with" statement is used to wrap the execution of a block with methods defined by a context manager.',
    "If the file does not exist, it is created; otherwise its contents are overwritten when it is closed.",
    "Return True if all elements of the iterable are true, or if the iterable is empty.",
    "A class definition defines a class object. The inheritance list usually gives a list of base classes.",
    "The optional argument is a function of one argument that is used to extract a comparison key.",
    "An exception is raised when the value cannot be converted. In that case the object is left unchanged.",
    "Names are resolved in the nearest enclosing scope, and it is an error to use one before it is bound.",
    "This method must be called before the first request, and returns the number of bytes that were sent.",
)
CODE = (
    "import os\nimport sys\n\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n",
    "class Node:\n    def __init__(self, value, next=None):\n        self.value = value\n        self.next = next\n",
    "    def __exit__(self, exc_type, value, tb):\n        if self._fp is not None:\n            self._fp.close()\n",
    "for i in range(len(data)):\n    if data[i] == 0:\n        continue\n    total += data[i] * weights[i]\n",
    "try:\n    from _json import scanstring as c_scanstring\nexcept ImportError:\n    c_scanstring = None\n",
    "    while True:\n        line = self.rfile.readline(_MAXLINE + 1)\n        if not line:\n            break\n",
    "def _check(self, key):\n    if not isinstance(key, str):\n        raise TypeError('keys must be strings')\n",
    "        self.assertEqual(a.get(1), None)\n        self.assertRaises(KeyError, a.pop, 2)\n        b = dict(a)\n",
)
KINDS = {"prose": PROSE, "code": CODE}
