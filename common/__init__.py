"""What the ten papers share. Imported before any other package."""

import sys
import warnings

if sys.flags.warn_default_encoding:  # the question is which of our files are read in the locale's encoding
    foreign = "cv2|matplotlib|regex|timm|torch|transformers"
    warnings.filterwarnings("ignore", category=EncodingWarning, module=rf"({foreign})(\.|$)")
