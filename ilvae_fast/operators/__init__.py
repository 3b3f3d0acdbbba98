"""Potential, Brenier map and their derivatives at prepared operands.

``operands.py`` checks and holds the arguments of a call. ``dispatch.py`` sends them to an implementation: to the
compiled operators (``native.py``), to autograd functions with rules for PyTorch's transformations (``rules.py``), or to
plain autograd (``plain.py`` on ``reference.py``). ``plan.py`` says what a call costs, ``extension.py`` loads the
compiled extension.
"""
