"""Studies: many searches as one resumable job, and what comes out of them with error bars."""

from rfdarts_fast.study.spec import NAMED, PlannedRun, Study, read_study
from rfdarts_fast.study.summary import StudyResults, load_study

__all__ = ["NAMED", "PlannedRun", "Study", "StudyResults", "load_study", "read_study"]
