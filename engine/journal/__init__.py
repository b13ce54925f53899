"""What a coordinator has accepted and told, kept in a file for the one after it."""

from drumline.engine.journal.batches import Batch
from drumline.engine.journal.journal import Journal
from drumline.engine.journal.opening import journal_term

__all__ = ["Batch", "Journal", "journal_term"]
