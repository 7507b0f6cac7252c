"""Every sampler as a table; the noise levels behind it; the short way from the last trained step to the image."""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.schedules.samplers import Schedule as Schedule
    from adascope_fast.schedules.samplers import dance_sde as dance_sde
    from adascope_fast.schedules.samplers import ddim as ddim
    from adascope_fast.schedules.samplers import ddpm as ddpm
    from adascope_fast.schedules.samplers import flow_cps as flow_cps
    from adascope_fast.schedules.samplers import flow_ode as flow_ode
    from adascope_fast.schedules.samplers import flow_sde as flow_sde
    from adascope_fast.schedules.samplers import shifted_sigmas as shifted_sigmas

__getattr__ = lazy(
    __name__,
    {
        "Schedule": "samplers",
        "dance_sde": "samplers",
        "ddim": "samplers",
        "ddpm": "samplers",
        "flow_cps": "samplers",
        "flow_ode": "samplers",
        "flow_sde": "samplers",
        "shifted_sigmas": "samplers",
    },
)
