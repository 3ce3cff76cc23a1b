"""Folders of torch.distributed.checkpoint as several processes would write them, and what torch reads of them."""

import io
import pickle
import warnings
from itertools import pairwise, product

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as md
from torch.distributed.checkpoint.filesystem import _StorageInfo


def boxes(shape, cuts):
    """Cut a shape at the given places of each dimension; return (offset, sizes) pairs."""
    edges = [[0, *cuts.get(d, ()), n] for d, n in enumerate(shape)]
    spans = [list(pairwise(e)) for e in edges]
    return [([a for a, _ in box], [b - a for a, b in box]) for box in product(*spans)]


def write_dcp(root, stored, cuts, files=2, save=torch.save):
    """Write tensors in chunks, shared out among files back to front, and bytes entries between them."""
    root.mkdir(parents=True)
    streams = [io.BytesIO() for _ in range(files)]
    entries, places = {}, {}
    for name, tensor in stored.items():
        if not torch.is_tensor(tensor):
            entries[name] = md.BytesStorageMetadata()
            start = streams[0].tell()
            torch.save(tensor, streams[0])
            places[md.MetadataIndex(name)] = _StorageInfo("__0_0.distcp", start, streams[0].tell() - start)
            continue
        chunks = boxes(tensor.shape, cuts.get(name, {}))
        for i, (offset, sizes) in reversed(list(enumerate(chunks))):
            file = (i + len(places)) % files
            start = streams[file].tell()
            part = tensor[tuple(slice(a, a + n) for a, n in zip(offset, sizes, strict=True))]
            save(part.clone(memory_format=torch.contiguous_format), streams[file])
            places[md.MetadataIndex(name, offset, i)] = _StorageInfo(
                f"__{file}_0.distcp", start, streams[file].tell() - start
            )
        entries[name] = md.TensorStorageMetadata(
            md.TensorProperties(tensor.dtype),
            tensor.shape,
            [md.ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in chunks],
        )
    for i, stream in enumerate(streams):
        (root / f"__{i}_0.distcp").write_bytes(stream.getvalue())
    meta = md.Metadata(entries, {name: (name,) for name in stored}, places, md.StorageMeta(root, "id"))
    (root / ".metadata").write_bytes(pickle.dumps(meta))
    return meta


def load_dcp(root, like):
    """Load the tensors of ``like`` as torch does."""
    out = {name: torch.empty_like(t) for name, t in like.items() if torch.is_tensor(t)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(out, checkpoint_id=root, no_dist=True)
    return out
