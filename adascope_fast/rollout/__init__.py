"""How samples are collected: prompts, one denoising step, whole trajectories, and the batches that training makes."""

from adascope_fast.rollout.branched import Branches as Branches
from adascope_fast.rollout.branched import Branching as Branching
from adascope_fast.rollout.branched import Candidates as Candidates
from adascope_fast.rollout.branched import PreferenceModel as PreferenceModel
from adascope_fast.rollout.branched import SpreadBranches as SpreadBranches
from adascope_fast.rollout.denoising import Advance as Advance
from adascope_fast.rollout.denoising import Denoising as Denoising
from adascope_fast.rollout.denoising import predict as predict
from adascope_fast.rollout.denoising import predict_in_one as predict_in_one
from adascope_fast.rollout.denoising import split as split
from adascope_fast.rollout.flat_tables import FlatTables as FlatTables
from adascope_fast.rollout.noise import OwnNoise as OwnNoise
from adascope_fast.rollout.prompts import EncodedPrompts as EncodedPrompts
from adascope_fast.rollout.prompts import PromptCache as PromptCache
from adascope_fast.rollout.sampling import rollout as rollout
from adascope_fast.rollout.shared_start import SharedStart as SharedStart
from adascope_fast.rollout.spread import Spread as Spread
from adascope_fast.rollout.spread import SpreadTrajectory as SpreadTrajectory
from adascope_fast.rollout.stills import ImageCache as ImageCache
from adascope_fast.rollout.stills import Stills as Stills
from adascope_fast.rollout.stills import StoredImage as StoredImage
from adascope_fast.rollout.trajectory import StepBatch as StepBatch
from adascope_fast.rollout.trajectory import Tables as Tables
from adascope_fast.rollout.trajectory import Trajectory as Trajectory
