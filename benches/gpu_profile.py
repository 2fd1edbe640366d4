"""What `ncu --csv` measured of a pass, summed over kernels of one name and grid.

    benches/gpu_profile.py FILE
"""

import csv
import sys
from collections import defaultdict

with open(sys.argv[1], encoding="utf-8") as file:
    lines = [line for line in file if line.startswith('"')]
kernels = {}
for row in csv.DictReader(lines):
    name = row["Kernel Name"].split("(")[0].split("<")[0][:40]
    key = (name, row["Grid Size"].replace(" ", ""), row["Block Size"].split(",")[0].strip("( "))
    values = kernels.setdefault(row["ID"], (key, {}))[1]
    values[row["Metric Name"].split(".")[0]] = (
        float(row["Metric Value"].replace(",", "")),
        row["Metric Unit"],
    )

UNITS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}
BYTES = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
sums = defaultdict(lambda: [0, 0.0, 0.0, 0.0, 0.0])
for key, values in kernels.values():
    time, unit = values["gpu__time_duration"]
    moved, measure = values.get("dram__bytes", (0.0, "byte"))
    each = sums[key]
    each[0] += 1
    each[1] += time * UNITS[unit]
    each[2] += moved * BYTES[measure]
    each[3] += values.get("smsp__issue_active", (0.0, ""))[0]
    each[4] += values.get("sm__warps_active", (0.0, ""))[0]
print("| kernel | grid | threads | times | us each | us | GB/s | issue % | warps % |")
print("|---|---|---|---|---|---|---|---|---|")
for (name, grid, block), (n, time, moved, issue, warps) in sorted(
    sums.items(), key=lambda item: -item[1][1]
):
    print(
        f"| {name} | {grid} | {block} | {n} | {time / n:.1f} | {time:.0f} "
        f"| {moved / time / 1e3:.0f} | {issue / n:.0f} | {warps / n:.0f} |"
    )
print(f"all: {len(kernels)} kernels, {sum(each[1] for each in sums.values()):.0f} us")
