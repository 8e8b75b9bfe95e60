"""Studies of finished runs, ground truths for their scores, and the making of the demo.

infscan itself never imports this package; it finds its commands by an entry point.
"""
