"""Energy and carbon of a stage, by codecarbon where it is installed and the country is known."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def measured_energy(country: str | None) -> Iterator[dict[str, float]]:
    """Fill a dictionary with `energy_kwh` and `co2eq_kg` when the block ends.

    It stays empty without a country (ISO 3166, three letters) or without codecarbon: nothing is guessed, and
    nothing is looked up on the network.
    """
    figures: dict[str, float] = {}
    if country is None or importlib.util.find_spec("codecarbon") is None:
        yield figures
        return
    from codecarbon import OfflineEmissionsTracker

    tracker: Any = OfflineEmissionsTracker(
        country_iso_code=country, save_to_file=False, log_level="error", allow_multiple_runs=True
    )
    tracker.start()
    try:
        yield figures
    finally:
        carbon = tracker.stop()
        energy = getattr(tracker.final_emissions_data, "energy_consumed", None)
        if carbon is not None and energy is not None:
            figures.update({"energy_kwh": float(energy), "co2eq_kg": float(carbon)})
