import common  # noqa: F401 (before what a paper imports: see there)
