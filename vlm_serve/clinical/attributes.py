"""The attributes of a DICOM file that a prompt, a receipt and a log may see: an allow-list of closed lists.

A value passes only if it is a defined term of the standard, or a number turned into a band. A code string
is short, but a careless workstation puts a name into it and a hostile file an instruction; neither is a
defined term, so neither passes.
"""

import re

from pydicom.dataset import Dataset

KEYWORDS = (
    "Modality",
    "BodyPartExamined",
    "ViewPosition",
    "Laterality",
    "ImageLaterality",
    "PatientSex",
    "PatientAge",
)

_MODALITIES = """
AR ASMT AU BDUS BI BMD CFM CR CT DG DMS DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS KER KO LEN LP LS
M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT
RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC
"""
"""PS3.3 C.7.3.1.1.1, without the ones for documents and plans of no image."""

_BODY_PARTS = """
ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS AORTA APPENDIX ARM ARTERY ATRIUM AXILLA BACK BILEDUCT BLADDER BODY BONE BRAIN
BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CHOROIDPLEXUS
CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE
EYELID FACE FEMUR FINGER FOOT FOREARM GALLBLADDER GUM HAND HEAD HEADNECK HEART HIP HUMERUS ILEUM ILIUM IAC JAW JEJUNUM
KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MANDIBLE MASTOID MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST
NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PARATHYROID PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE
RADIUS RADIUSULNA RECTUM RIB SACRUM SCALP SCAPULA SCLERA SCROTUM SELLA SHOULDER SIJOINT SINUS SKULL SPINE SPLEEN SSPINE
STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB THYMUS THYROID TIBIA TIBIAFIBULA TLSPINE TMJ TOE TONGUE TRACHEA
TSPINE ULNA URETER URETHRA UTERUS VAGINA VEIN VULVA WHOLEBODY WRIST ZYGOMA
"""
"""PS3.16 Annex L, the ones that images are made of; spaces and underscores are taken out before comparing."""

_VIEWS = """
AP PA LL RL RLD LLD RLO LLO LAT LATERAL OBLIQUE AXIAL DECUBITUS
CC MLO ML LM LMO LMA FB SIO ISO CV AT XCC XCCL XCCM TAN
"""
"""PS3.3 C.8.1.1, C.8.11 and the mammography views."""

_VOCABULARY: dict[str, frozenset[str]] = {
    "Modality": frozenset(_MODALITIES.split()),
    "BodyPartExamined": frozenset(_BODY_PARTS.split()),
    "ViewPosition": frozenset(_VIEWS.split()),
    "Laterality": frozenset({"R", "L", "B", "U"}),
    "ImageLaterality": frozenset({"R", "L", "B", "U"}),
    "PatientSex": frozenset({"M", "F", "O"}),
}

_AGE = re.compile(r"([0-9]{1,3})([DWMY])\Z")
_CHILD_BANDS = ((1, "under 1"), (5, "1-4"), (12, "5-11"), (18, "12-17"), (30, "18-29"))
_OLDEST = 90
"""Ages from here on are one band: they identify (HIPAA's Safe Harbor names 89)."""


def allowed_attributes(dataset: Dataset) -> tuple[dict[str, str], tuple[str, ...]]:
    """The attributes that may be seen, and notes on the ones that were left out, which name no value.

    `PatientAge` becomes `PatientAgeBand` in years; `ImageLaterality` stands for `Laterality` where both are.
    """
    attributes: dict[str, str] = {}
    notes: list[str] = []
    for keyword in KEYWORDS:
        value = _text(dataset, keyword)
        if not value:
            continue
        name, allowed = keyword, _term(keyword, value)
        if keyword == "PatientAge":
            name, allowed = "PatientAgeBand", age_band(value)
        elif keyword == "ImageLaterality":
            name = "Laterality"
        if allowed is None:
            notes.append(f"{keyword} was left out: it is not a term that the standard defines.")
        else:
            attributes[name] = allowed
    return attributes, tuple(notes)


def age_band(age: str) -> str | None:
    """The band of an age string (PS3.5: `034Y`, `006M`, `012W`, `020D`), None where it is none."""
    match = _AGE.match(age)
    if match is None:
        return None
    years = int(match[1]) // {"D": 365, "W": 52, "M": 12, "Y": 1}[match[2]]
    for limit, band in _CHILD_BANDS:
        if years < limit:
            return band
    if years >= _OLDEST:
        return f"{_OLDEST} or over"
    return f"{years // 10 * 10}-{years // 10 * 10 + 9}"


def _term(keyword: str, value: str) -> str | None:
    term = value.upper().replace(" ", "").replace("_", "")
    return term if term in _VOCABULARY.get(keyword, frozenset()) else None


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return value.strip() if isinstance(value, str) else ""
