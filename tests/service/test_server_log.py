"""What the server writes to its log: one form, whoever says it."""

from __future__ import annotations

import json
import subprocess
import sys

from waiting import PATIENCE_S

SAYS = """
import logging
from interlock.config import Config
from interlock.service.server_log import configure_logging

configure_logging(Config(log_format="json"))
logging.getLogger("uvicorn.error").warning("Invalid %s request received.", "HTTP")
logging.getLogger("uvicorn.error").info("nobody wants to know")
try:
    b"\\xff".decode()
except UnicodeDecodeError:
    logging.getLogger("uvicorn.error").exception("Invalid UTF-8 sequence received from client.")
try:
    raise ValueError("broken")
except ValueError:
    logging.getLogger("some.library").exception("it broke")
"""


def test_what_a_library_says_is_a_line_of_json_too() -> None:
    ran = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    warned, garbage, broke = (json.loads(line) for line in ran.stderr.splitlines())
    assert (warned["event"], warned["level"]) == ("Invalid HTTP request received.", "warning")
    assert warned["library"] == "uvicorn.error"
    assert "timestamp" in warned
    assert (garbage["event"], garbage["level"]) == ("Invalid UTF-8 sequence received from client.", "info")
    assert "exception" not in garbage, "what a client sends is no defect of the server"
    assert (broke["event"], broke["level"], "ValueError: broken" in broke["exception"]) == ("it broke", "error", True)
