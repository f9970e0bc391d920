"""KDA kernels in CuTe DSL. Import a module to get its kernel; importing the package imports no cutlass."""
