"""People, or a model that sees, say which of two images is better, or how good one is; nobody knows whose they are."""

from adascope_fast.judging.model import Asked as Asked
from adascope_fast.judging.model import VisionModel as VisionModel
from adascope_fast.judging.model import ask_model as ask_model
from adascope_fast.judging.pairs import Comparison as Comparison
from adascope_fast.judging.pairs import arms_of as arms_of
from adascope_fast.judging.pairs import compare as compare
from adascope_fast.judging.questions import QUESTIONS as QUESTIONS
from adascope_fast.judging.questions import Question as Question
from adascope_fast.judging.questions import chosen as chosen
from adascope_fast.judging.results import results_of as results_of
from adascope_fast.judging.results import table as table
from adascope_fast.judging.results import write_results as write_results
from adascope_fast.judging.votes import Votes as Votes
