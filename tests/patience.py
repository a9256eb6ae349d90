"""How long tests wait for what a whole run does. No machine is so slow; only what hangs takes as long."""

PATIENCE_S = 900
