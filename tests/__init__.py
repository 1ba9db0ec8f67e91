"""A package of its own, so that no installed one is taken for it: torch-fidelity brings a `tests` along."""
