"""The compiled backends: C++ on the CPU (`cpp`) and CUDA (`cuda`), from csrc/."""
