"""A slow disk for processes with this folder on PYTHONPATH: each sync, rename and delete takes SLOW_DISK_SECONDS more, twice.

This makes it likely that a kill falls between writing, renaming and deleting.
"""

import os
import shutil
import time

SECONDS = float(os.environ["SLOW_DISK_SECONDS"])


def slowly(call):
    def slow(*arguments, **named):
        time.sleep(SECONDS)
        result = call(*arguments, **named)
        time.sleep(SECONDS)
        return result

    return slow


os.fsync, os.rename, os.replace = slowly(os.fsync), slowly(os.rename), slowly(os.replace)
shutil.rmtree = slowly(shutil.rmtree)
