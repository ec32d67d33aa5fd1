"""The Gradio app that `lolgen demo` starts: generate, edit, mix and inspect LoRAs, and make one speak, in a browser.

Imports among these files are relative: the folder is `demos/` in a clone and `lolgen/_demos/` in a wheel.
"""

from __future__ import annotations
