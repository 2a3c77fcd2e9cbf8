"""Every test but those marked gpu runs on the CPU platform, in one thread."""

import os


def pytest_configure(config):
    # forked ranks inherit a pool of OpenMP threads as a deadlock
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = config.getoption("markexpr", default="") or ""
    if "gpu" not in wanted or "not gpu" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from hypothesis import settings

    # a machine that also does something else is not a failure
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
