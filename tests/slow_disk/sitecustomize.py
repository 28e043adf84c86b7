"""A slow disk, for whoever has this folder on PYTHONPATH: syncing, renaming and deleting take their time.

It widens the windows between writing, committing and rotating, in which a kill could hurt.
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
