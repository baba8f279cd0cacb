"""What tests and benchmarks share: one table of cases, the accuracy rule, timing, and peers to compare with."""
