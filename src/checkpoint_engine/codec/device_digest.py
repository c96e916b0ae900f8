"""Chunk digests of bytes in a GPU's memory, taken there: the manifest's own, xxh3-128.

xxh3 mixes 8 lanes of 64 bits. Within a block of 1 KiB a lane only adds up, in any order; from block
to block it scrambles, in order. So one kernel adds up all blocks of all chunks at the speed of the
memory, and a second takes each lane of each chunk through its sums: 4096 short steps for 4 MiB, all
chunks at the same time. A group of 256 MB takes a fraction of a millisecond.

Chunks of at most 240 bytes are hashed in another way; they are fetched, and hashed here.

    plan = DevicePlan.of([(0, 4 << 20), (4 << 20, 100)], device)        # while serving
    digests = plan.begin(data)                                          # queued
    digests.wait() == [digest, digest]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from checkpoint_engine.codec.digest import chunk_digest
from checkpoint_engine.cuda import compile_kernels, new_event, wait
from checkpoint_engine.manifest import ALIGNMENT_BYTES, CHUNK_BYTES

__all__ = ["SOURCE", "DevicePlan", "Digests", "chunk_digests_there"]

SHORT_BYTES = 240
BLOCK_BYTES = 1024
LANES = 8
THREADS = 256
CHUNKS_AT_ONCE = 4  # by the threads of one warp, each of which has a lane

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)

SOURCE = (
    "typedef unsigned long long u64; typedef unsigned int u32; typedef unsigned char u8;\n"
    "static __device__ const u64 SECRET[24] = {"
    + ", ".join(f"0x{word:016x}ull" for word in np.frombuffer(SECRET, dtype="<u8"))
    + "};\n"
    + r"""
static __device__ const u64 START[8] = {
    0xC2B2AE3Dull, 0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
    0x85EBCA77C2B2AE63ull, 0x85EBCA77ull, 0x27D4EB2F165667C5ull, 0x9E3779B1ull};

static __device__ u64 secret(int at) {
    int word = at / 8, bits = at % 8 * 8;
    return bits ? SECRET[word] >> bits | SECRET[word + 1] << (64 - bits) : SECRET[word];
}

static __device__ u64 product(u64 value) { return (value & 0xffffffffull) * (value >> 32); }

static __device__ u64 folded(u64 a, u64 b) {
    u64 low = (a & 0xffffffffull) * (b & 0xffffffffull);
    u64 left = (a >> 32) * (b & 0xffffffffull), right = (a & 0xffffffffull) * (b >> 32);
    u64 cross = (low >> 32) + (left & 0xffffffffull) + right;
    u64 high = (left >> 32) + (cross >> 32) + (a >> 32) * (b >> 32);
    return (cross << 32 | (low & 0xffffffffull)) ^ high;
}

static __device__ u64 merged(const u64* lanes, int at, u64 sum) {
    for (int i = 0; i < 8; i += 2)
        sum += folded(lanes[i] ^ secret(at + 8 * i), lanes[i + 1] ^ secret(at + 8 * i + 8));
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9ull;
    return sum ^ sum >> 32;
}

// A chunk is a row of `table`: its start, its length, and the number of blocks before it.
extern "C" __global__ void sums(const u64* data, const long long* table, u64* out) {
    const long long* chunk = table + 3 * blockIdx.x;
    u64 thread = (u64)blockIdx.y * blockDim.x + threadIdx.x, block = thread / 8, lane = thread % 8;
    if (block >= (u64)(chunk[1] - 1) / 1024) return;
    const u64* words = data + chunk[0] / 8 + block * 128;
    u64 sum = 0;
    for (int stripe = 0; stripe < 16; ++stripe)
        sum += words[8 * stripe + (lane ^ 1)]
             + product(words[8 * stripe + lane] ^ SECRET[stripe + lane]);
    out[(chunk[2] + block) * 8 + lane] = sum;
}

extern "C" __global__ void digests(
        const u64* data, const long long* table, const u64* sums, const long long* number,
        u64* out) {
    __shared__ u64 lanes[32];
    long long index = (long long)blockIdx.x * 4 + threadIdx.x / 8;
    int lane = threadIdx.x % 8;
    bool is_there = index < *number;
    const long long* chunk = table + 3 * (is_there ? index : 0);
    long long length = chunk[1], num_blocks = (length - 1) / 1024;
    const u64* own = sums + chunk[2] * 8 + lane;
    const u8* bytes = (const u8*)data + chunk[0];
    u64 sum = START[lane], key = SECRET[16 + lane];
    long long block = 0;
    for (; block + 16 <= num_blocks; block += 16) {
        u64 next[16];
        for (int i = 0; i < 16; ++i) next[i] = own[(block + i) * 8];
        for (int i = 0; i < 16; ++i) {
            sum += next[i];
            sum = (sum ^ sum >> 47 ^ key) * 0x9E3779B1ull;
        }
    }
    for (; block < num_blocks; ++block) {
        sum += own[block * 8];
        sum = (sum ^ sum >> 47 ^ key) * 0x9E3779B1ull;
    }
    const u64* words = (const u64*)(bytes + num_blocks * 1024);
    int num_stripes = (int)((length - 1 - num_blocks * 1024) / 64);
    for (int stripe = 0; stripe < num_stripes; ++stripe)
        sum += words[8 * stripe + (lane ^ 1)]
             + product(words[8 * stripe + lane] ^ SECRET[stripe + lane]);
    u64 mine = 0, other = 0;  // the last 64 bytes, which may begin anywhere
    for (int i = 7; i >= 0; --i) {
        mine = mine << 8 | bytes[length - 64 + 8 * lane + i];
        other = other << 8 | bytes[length - 64 + 8 * (lane ^ 1) + i];
    }
    lanes[threadIdx.x] = sum + other + product(mine ^ secret(121 + 8 * lane));
    __syncthreads();
    if (!is_there || lane > 1) return;
    const u64* all = lanes + threadIdx.x / 8 * 8;
    out[2 * index + lane] = lane
        ? merged(all, 11, (u64)length * 0x9E3779B185EBCA87ull)
        : merged(all, 117, ~((u64)length * 0xC2B2AE3D27D4EB4Full));
}
"""
)


@dataclass(frozen=True)
class Digests:
    """Of chunks, as soon as the device has taken them.

    Attributes:
        plan: which chunks.
        words: two for each long chunk, the more significant first.
        rows: the first bytes of each short chunk.
        done: is past when both are there.
    """

    plan: DevicePlan
    words: torch.Tensor
    rows: torch.Tensor
    done: torch.cuda.Event

    def wait(self) -> list[bytes]:
        """The digests, in the order of the chunks.

        Raises:
            DeadlineExceeded: something that was queued before hangs.
        """
        wait(self.done)
        return self.plan.in_order(self.words.numpy(), self.rows.numpy())


@dataclass(frozen=True)
class DevicePlan:
    """Chunks of a piece of memory; what is known of them lies on the device.

    Attributes:
        long: which of the chunks are longer than 240 bytes.
        lengths: of all chunks, in bytes.
        num_blocks: of the long chunks.
        table: of the long chunks, as the kernels have it.
        number: how many of those there are.
        short_rows: where the short ones begin, in units of 256 bytes.
    """

    long: tuple[bool, ...]
    lengths: tuple[int, ...]
    num_blocks: int
    table: torch.Tensor
    number: torch.Tensor
    short_rows: torch.Tensor

    @classmethod
    def of(cls, chunks: Sequence[tuple[int, int]], device: torch.device) -> DevicePlan:
        """Of (start, length) of chunks that are not empty and start at multiples of 256.

        Raises:
            AdapterError: kernels cannot be compiled for this device.
        """
        compile_kernels(SOURCE, ("sums", "digests"), device)
        return cls._laid_out(tuple(chunks), device)

    @classmethod
    @functools.lru_cache(maxsize=4096)  # every version of a model has the same: 1 TB of it
    def _laid_out(cls, chunks: tuple[tuple[int, int], ...], device: torch.device) -> DevicePlan:
        table, rows, num_blocks = [], [], 0
        for start, length in chunks:
            if length > SHORT_BYTES:
                table += [start, length, num_blocks]
                num_blocks += (length - 1) // BLOCK_BYTES
            else:
                rows.append(start // ALIGNMENT_BYTES)
        num_long = len(table) // 3
        words = torch.tensor([num_long, *table, *rows]).to(device)  # one copy, as each takes long
        return cls(
            long=tuple(length > SHORT_BYTES for _, length in chunks),
            lengths=tuple(length for _, length in chunks),
            num_blocks=num_blocks,
            table=words[1 : 1 + len(table)],
            number=words[:1],
            short_rows=words[1 + len(table) :],
        )

    def begin(self, data: torch.Tensor) -> Digests:
        """Queue everything on the current stream.

        Args:
            data: the memory as bytes, that starts at a multiple of 256 of them; as many more as
                that must be there where short chunks begin.
        """
        device, num_long = data.device, sum(self.long)
        words = torch.empty((num_long, 2), dtype=torch.int64, device=device)
        if num_long:
            kernels = compile_kernels(SOURCE, ("sums", "digests"), device)
            sums = torch.empty((self.num_blocks, LANES), dtype=torch.int64, device=device)
            most = max(length for length in self.lengths)
            per_block = -(-most // BLOCK_BYTES) * LANES
            kernels["sums"](
                grid=(num_long, -(-per_block // THREADS)),
                block=THREADS,
                arguments=[data, self.table, sums],
            )
            kernels["digests"](
                grid=(-(-num_long // CHUNKS_AT_ONCE), 1),
                block=CHUNKS_AT_ONCE * LANES,
                arguments=[data, self.table, sums, self.number, words],
            )
        whole = data[: len(data) // ALIGNMENT_BYTES * ALIGNMENT_BYTES]
        rows = whole.view(-1 if len(whole) else 0, ALIGNMENT_BYTES).index_select(0, self.short_rows)
        words_here, rows_here, done = _fetched(words), _fetched(rows), new_event()
        done.record(torch.cuda.current_stream(device))
        return Digests(self, words_here, rows_here, done)

    def in_order(self, words: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8]) -> list[bytes]:
        """The digest of every chunk, from what the device gave."""
        long = iter(words.view("<u8").astype(">u8"))
        short = iter(rows)
        return [
            next(long).tobytes() if is_long else chunk_digest(memoryview(next(short)[:length]))
            for is_long, length in zip(self.long, self.lengths, strict=True)
        ]


def chunk_digests_there(data: torch.Tensor) -> bytes:
    """The digests of all 4 MiB chunks of one tensor's bytes, one after the other, from a GPU.

    Queued on the current stream, and waited for.

    Args:
        data: starts at a multiple of 256 bytes of its device's memory.
    """
    starts = range(0, len(data), CHUNK_BYTES)
    chunks = [(start, min(CHUNK_BYTES, len(data) - start)) for start in starts]
    short = chunks.pop() if chunks and chunks[-1][1] <= SHORT_BYTES else None
    with torch.cuda.device(data.device):
        digests = DevicePlan.of(chunks, data.device).begin(data).wait() if chunks else []
    if short is not None:
        digests.append(chunk_digest(data[short[0] :].cpu().numpy().data))
    return b"".join(digests)


def _fetched(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is there when the stream has come so far."""
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return here.copy_(tensor, non_blocking=True)
