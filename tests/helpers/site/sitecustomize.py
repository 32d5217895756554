"""What Python runs when it starts, for the processes that a test starts and those that they start."""

import sys

# A process of torch or multiprocessing that has a program to run; tools such as compilers start Python too.
if "pip" not in sys.argv[:1]:
    import smaller

    smaller.shrink()
