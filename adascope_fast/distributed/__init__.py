"""Several processes of one run: what they tell each other, and how work is dealt out to them."""

from adascope_fast.distributed.ranks import RankLostError as RankLostError
from adascope_fast.distributed.ranks import Ranks as Ranks
from adascope_fast.distributed.ranks import bounds_of as bounds_of
from adascope_fast.distributed.ranks import dealt as dealt
from adascope_fast.distributed.ranks import most_batches as most_batches
from adascope_fast.distributed.ranks import tells_of_lost_ranks as tells_of_lost_ranks
