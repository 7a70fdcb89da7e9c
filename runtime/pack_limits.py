"""Limits of packing and of the cache folder."""

from __future__ import annotations

from typing import Final

PACKER_IDLE_S: Final = 30.0  # an idle packer is sent home
PACK_RETRY_S: Final = (5.0, 15.0, 60.0, 300.0)  # after failures that are not the model's
PACK_REMARK_S: Final = 60.0  # after which its silence is logged, and again after as long
PACK_TRIES_MAX: Final = 2  # a packer that dies twice over one version means a broken version

DAY_S: Final = 86_400.0
CACHE_KEEP_DAYS: Final = 7.0  # what nothing has needed for so long is removed
CACHE_FIRST_S: Final = 60.0  # after the start
CACHE_RENEW_S: Final = 3600.0  # each server says so often what it needs
CACHE_KEEP_DAYS_MIN: Final = 2 * CACHE_RENEW_S / DAY_S  # less takes from others what they need
CACHE_KEEP_DAYS_MAX: Final = 36_500
CACHE_FULL_KEEP_S: Final = 2 * CACHE_RENEW_S  # when a disk is full
CACHE_FULL_PERIOD_S: Final = 60.0
CACHE_CLOSE_S: Final = 5.0
