"""Looks at the machine: facts for core/doctor, a module for each subject. Nothing is changed by a look."""
