"""Images on disk with the prompts that they were drawn for."""

from adascope_fast.images.folders import ENDINGS as ENDINGS
from adascope_fast.images.folders import Folder as Folder
from adascope_fast.images.folders import Image as Image
from adascope_fast.images.folders import folders as folders
from adascope_fast.images.folders import read as read
