"""An independent reading of the mathematics, in numpy."""

import os

# Before numpy is loaded: its threads spin while they wait, which on a small machine takes the
# processors from the server under test and makes these small products several times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
