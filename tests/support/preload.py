"""Imports what takes seconds to import, once, in the server from which ranks are forked."""

import trainer.checkpoint
import trainer.evaluate.held_out
import trainer.loop  # noqa: F401
from trainer.data.order import import_streaming

import_streaming()
