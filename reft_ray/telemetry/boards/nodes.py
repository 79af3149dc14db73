"""The Accelerators and Data path dashboards, from the metrics of Ray and of NVIDIA's DCGM exporter."""

from __future__ import annotations

from reft_ray.telemetry.panel import NODES, ON_CLUSTER, Board, DisplayUnit, Line, Panel, Section, Thresholds

_BY = "by (Hostname, gpu)"
_GPU = "{{Hostname}} {{gpu}}"


def _dcgm(title: str, description: str, unit: DisplayUnit, expr: str, thresholds: Thresholds | None = None) -> Panel:
    return Panel(title, description, unit, (Line(expr, _GPU),), thresholds or Thresholds(), needs="dcgm")


_DEVICES = Section(
    "Devices, by the DCGM exporter",
    (
        _dcgm(
            "Busy",
            "Share of time in which a kernel ran. A busy accelerator is the aim.",
            DisplayUnit.SHARE,
            f"max {_BY} (DCGM_FI_DEV_GPU_UTIL{{{ON_CLUSTER}}}) / 100",
        ),
        _dcgm(
            "Tensor cores",
            "Share of cycles in which the tensor cores worked; low while busy means small batches.",
            DisplayUnit.SHARE,
            f"max {_BY} (DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{{ON_CLUSTER}}})",
        ),
        _dcgm(
            "Memory in use",
            "Share of the device memory; a teacher's update needs its weights twice.",
            DisplayUnit.SHARE,
            f"max {_BY} (DCGM_FI_DEV_FB_USED{{{ON_CLUSTER}}} / (DCGM_FI_DEV_FB_USED{{{ON_CLUSTER}}} "
            f"+ DCGM_FI_DEV_FB_FREE{{{ON_CLUSTER}}}))",
            Thresholds(0.9, 0.97),
        ),
        _dcgm(
            "Temperature",
            "Degrees Celsius of the device.",
            DisplayUnit.CELSIUS,
            f"max {_BY} (DCGM_FI_DEV_GPU_TEMP{{{ON_CLUSTER}}})",
            Thresholds(83, 90),
        ),
        _dcgm(
            "Power",
            "Watts of the device.",
            DisplayUnit.WATT,
            f"max {_BY} (DCGM_FI_DEV_POWER_USAGE{{{ON_CLUSTER}}})",
        ),
        _dcgm(
            "XID errors",
            "The last error code of the driver; any value above 0 names a fault of the device or of a program.",
            DisplayUnit.NUMBER,
            f"max {_BY} (DCGM_FI_DEV_XID_ERRORS{{{ON_CLUSTER}}})",
            Thresholds(bad=1e-9),
        ),
    ),
)
_RAY = Section(
    "Devices, by Ray",
    (
        Panel(
            "GPUs",
            "Utilisation per GPU of the nodes of Ray.",
            DisplayUnit.SHARE,
            (
                Line(
                    f"max by (instance, GpuIndex) (ray_node_gpus_utilization{{{NODES}}}) / 100",
                    "{{instance}} {{GpuIndex}}",
                ),
            ),
            needs="gpu",
        ),
        Panel(
            "GPU memory",
            "Bytes of device memory in use.",
            DisplayUnit.BYTES,
            (
                Line(
                    f"max by (instance, GpuIndex) (ray_node_gram_used{{{NODES}}}) * 1024 * 1024",
                    "{{instance}} {{GpuIndex}}",
                ),
            ),
            needs="gpu",
        ),
    ),
)
ACCELERATORS = Board("gpu", "Accelerators", "Use, memory, temperature and faults of the GPUs.", (_DEVICES, _RAY))


def _ray(title: str, description: str, unit: DisplayUnit, expr: str, legend: str, needs: str = "ray") -> Panel:
    return Panel(title, description, unit, (Line(expr, legend),), needs=needs)


_STORE = Section(
    "Ray's object store",
    (
        _ray(
            "Object store",
            "Bytes in Ray's object store by location; spilled objects are read from disk.",
            DisplayUnit.BYTES,
            f"sum by (Location) (ray_object_store_memory{{{NODES}}})",
            "{{Location}}",
        ),
        _ray(
            "Disk in use",
            "Share of each node's disk; spilling and checkpoints fill it.",
            DisplayUnit.SHARE,
            f"max by (instance) (ray_node_disk_usage{{{NODES}}}) / (max by (instance) (ray_node_disk_usage{{{NODES}}}) "
            f"+ max by (instance) (ray_node_disk_free{{{NODES}}}))",
            "{{instance}}",
        ),
        _ray(
            "Network",
            "Bytes per second that each node sends and receives.",
            DisplayUnit.BYTES_PER_SECOND,
            f"max by (instance) (ray_node_network_receive_speed{{{NODES}}} + ray_node_network_send_speed{{{NODES}}})",
            "{{instance}}",
        ),
    ),
)
_DATA = Section(
    "Ray Data",
    (
        _ray(
            "Rows out of each operator",
            "Rows per second by operator of a screening or a training input.",
            DisplayUnit.ROWS_PER_SECOND,
            f"sum by (dataset, operator) (rate(ray_data_output_rows{{{NODES}}}[$__rate_interval]))",
            "{{dataset}} {{operator}}",
            "data",
        ),
        _ray(
            "Bytes spilled",
            "Bytes per second that Ray Data spilled to disk; steady spilling means too many units in flight.",
            DisplayUnit.BYTES_PER_SECOND,
            f"sum by (dataset) (rate(ray_data_spilled_bytes{{{NODES}}}[$__rate_interval]))",
            "{{dataset}}",
            "data",
        ),
        _ray(
            "Blocks waiting",
            "Blocks in the input queues of each operator: they pile up before the slowest one.",
            DisplayUnit.NUMBER,
            f"sum by (dataset, operator) (ray_data_num_external_inqueue_blocks{{{NODES}}})",
            "{{dataset}} {{operator}}",
            "data",
        ),
    ),
)
DATA = Board("data", "Data path", "Object store, disks, network and Ray Data.", (_STORE, _DATA))
