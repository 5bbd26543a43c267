"""Plots and HTML reports that open without a network: every figure is inside the page."""
