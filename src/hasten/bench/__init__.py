"""Measuring: hasten beside its peers on one machine, as records from which every table and plot is made."""
