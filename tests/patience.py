"""How long tests wait for whole runs, on a machine that others use too. Only what hangs takes as long."""

PATIENCE_S = 900  # of one run
TEST_S = 1200  # of a test of runs, where it has no limit of its own
