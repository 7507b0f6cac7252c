"""Small servers over HTTP: who may ask, and how much; what they answer is their own."""

from adascope_fast.serving.guard import Aside as Aside
from adascope_fast.serving.guard import Guard as Guard
from adascope_fast.serving.guard import new_token as new_token
from adascope_fast.serving.guard import require as require
from adascope_fast.serving.guard import serve as serve
