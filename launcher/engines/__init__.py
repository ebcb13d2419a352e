"""The two engines, behind the interface of base.py; choose.py picks one."""
