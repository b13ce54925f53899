"""Who holds what of a model: the data, and its table, sentences and picture."""

from drumline.engine.layout_report.question import Question, ask
from drumline.engine.layout_report.ranks import RankReport, rank_reports
from drumline.engine.layout_report.report import LayoutReport, report

__all__ = ["LayoutReport", "Question", "RankReport", "ask", "rank_reports", "report"]
