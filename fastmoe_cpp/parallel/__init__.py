"""The layer over several ranks, on torch.distributed."""

from .exchange import ExchangeError, all_to_all_rows, exchange_counts

__all__ = ["ExchangeError", "all_to_all_rows", "exchange_counts"]
