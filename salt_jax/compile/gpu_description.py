"""GPUs in the words of XLA's compiler: a GpuTargetConfigProto as text. No jax in here.

All but name, memory and bandwidth is that of XLA's own h100_sxm
(xla/backends/gpu/target_config/specs); an H200 is the same chip with other memory.
"""

from salt_jax.compile.target import Gpu

CLOCK, MATRIX_CLOCK = 1.98, 1.8295201  # GHz
# A number of XLA's PrimitiveType -> clock, units of a core, operations of a unit in a tick
SCALAR = {
    4: (CLOCK, 64, 1),
    8: (CLOCK, 64, 1),
    10: (CLOCK, 128, 2),
    11: (CLOCK, 128, 1),
    12: (CLOCK, 64, 1),
    16: (CLOCK, 128, 2),
}
EIGHT_BITS = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36)
MATRIX = {
    **dict.fromkeys(EIGHT_BITS, (MATRIX_CLOCK, 4, 1024)),
    10: (MATRIX_CLOCK, 4, 512),
    11: (MATRIX_CLOCK, 4, 256),
    12: (CLOCK, 4, 32),
    16: (MATRIX_CLOCK, 4, 512),
}


def describe(gpu: Gpu, cudnn: tuple[int, ...], jax_version: tuple[int, ...]) -> str:
    """The text that `topologies.get_topology_desc` takes as target_config.

    Args:
      cudnn: the version of the cuDNN that is installed and will plan, such as (9, 25, 1).
      jax_version: what reads it, such as (0, 12).
    """
    major, minor, patch = cudnn[:3]
    # unknown before
    granularity = "collective_memory_granularity: 2097152" if jax_version >= (0, 12) else ""
    return f"""gpu_device_info {{
  name: "{gpu.name}" device_vendor: "NVIDIA Corporation" model_str: "sm_9.0a"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: 52428800 ecc_enabled: true
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: {CLOCK}
  device_address_bits: 64 pcie_bandwidth: 34359738368
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  {_rates("scalar_unit_description", SCALAR)}
  {_rates("matrix_unit_description", MATRIX)}
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "{major}.{minor}.{patch}" cub_version: "3.1.2"
  device_interconnect_info {{ active_links: 18 }} {granularity}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
device_description_str: "{gpu.name}"
"""


def _rates(unit: str, table: dict[int, tuple[float, int, int]]) -> str:
    rows = (
        f"rate_infos {{ key: {key} value "
        f"{{ clock_rate_ghz: {clock} units_per_core: {units} ops_per_clock: {ops} }} }}"
        for key, (clock, units, ops) in table.items()
    )
    return f"{unit} {{ {' '.join(rows)} }}"
