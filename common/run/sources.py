"""Where the data sets that recipes are meant for come from. Standard library only: read before an installation."""

SOURCES = {
    "ImageNet-1K": "image-net.org (ILSVRC2012, registration): train/<class>/*.JPEG and val/<class>/*.JPEG",
    "Imagenette": "github.com/fastai/imagenette: train/<class>/*.JPEG and val/<class>/*.JPEG",
    "Tiny-ImageNet-100": "half of the classes of cs231n.stanford.edu/tiny-imagenet-200.zip, as image folders at 64 px: "
    "train/<class>/*.JPEG and val/<class>/*.JPEG",
    "CIFAR-10": "cs.toronto.edu/~kriz/cifar.html (the Python version): data_batch_1 ... test_batch, batches.meta",
    "COCO": "cocodataset.org: train2017/, val2017/ and annotations/",
    "COCO captions": "cocodataset.org: train2017/, val2017/ and annotations/captions_*2017.json",
    "Flickr8k": "its release of 8,000 photographs, the captions written in COCO's format: train/, val/ and "
    "annotations/captions_train.json, captions_val.json",
    "pictures": "any folder of pictures: train/ and val/, with or without folders in them",
    "pictures of many objects or of one": "papers.maskco.scripts.mini_sets, which makes many_objects/ and one_object/ "
    "of Flickr8k or COCO and of Imagenette",
    "GOT-10k": "got-10k.aitestunion.com: train/, val/ and test/ with list.txt",
    "LaSOT": "vision.cs.stonybrook.edu/~lasot: a folder for each sequence, and testing_set.txt",
    "TrackingNet": "tracking-net.org: TRAIN_0/ ... TRAIN_11/ and TEST/ with frames/ and anno/",
    "OTB": "visual-tracking.net: a folder for each sequence with img/ and groundtruth_rect.txt",
    "VOT": "votchallenge.net: a folder for each sequence with groundtruth.txt, and list.txt",
    "Kinetics-400": "github.com/cvdfoundation/kinetics-dataset: train/, val/ and annotations/train.csv, val.csv",
    "UCF101": "crcv.ucf.edu/data/UCF101.php: UCF-101/ and ucfTrainTestlist/",
    "HMDB51": "serre-lab.clps.brown.edu (HMDB): hmdb51_org/ and testTrainMulti_7030_splits/",
    "Something-Something v1": "20bn.com's release: 20bn-something-something-v1/ and the *.csv lists",
    "real videos": "videos of your own, cut small by papers/ctp/scripts: train.txt and val.txt",
    "CapsFusion-30M": "huggingface.co/datasets/BAAI/CapsFusion-120M: downloaded into shards, train-000000.tar ...",
    "Conceptual Captions": "ai.google.com/research/ConceptualCaptions: downloaded into shards, train-000000.tar ...",
    "LLaVA-1.5 mixture": "github.com/haotian-liu/LLaVA (llava_v1_5_mix665k.json): conversations_train.json and images",
    "image-text pairs": "any pairs as shards: train-000000.tar ... of KEY.jpg and KEY.txt",
    "image-text pairs and regions": "the pairs, and annotations/instances_train*.json for the regions",
}


def source(dataset: str) -> str:
    """Where a data set, or those named in a list of several, comes from; nothing for one that is not known."""
    names = [name for name in SOURCES if name == dataset] or [
        name for part in dataset.replace(" side by side", "").replace(" and ", ", ").split(", ")
        for name in SOURCES if name.lower() == part.lower()
    ]
    return "; ".join(f"{name} from {SOURCES[name]}" for name in names)
