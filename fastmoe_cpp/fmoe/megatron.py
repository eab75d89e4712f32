"""FastMoE's Megatron-LM half is the package megatron_adapters here; importing this module says so."""

raise ImportError(
    "fmoe.megatron is the package megatron_adapters in fastmoe_cpp: use megatron_adapters.get_adapter(version), which "
    "has fmoefy and the patches of that version"
)
