"""DeformVOS: video object segmentation that follows objects through a stream, loaded with one line of transformers."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_deformvos import DeformVosConfig
from .image_processing_deformvos import DeformVosImageProcessor
from .inference_session_deformvos import DeformVosInferenceSession
from .modeling_deformvos import DeformVosModel, DeformVosOutput, DeformVosPreTrainedModel, DeformVosVideoOutput
from .pipeline_deformvos import TASK, DeformVosPipeline
from .processing_deformvos import DeformVosProcessor


__version__ = "0.1.0"

AutoConfig.register(DeformVosConfig.model_type, DeformVosConfig, exist_ok=True)
AutoModel.register(DeformVosConfig, DeformVosModel, exist_ok=True)
AutoImageProcessor.register(DeformVosConfig, slow_image_processor_class=DeformVosImageProcessor, exist_ok=True)
AutoProcessor.register(DeformVosConfig, DeformVosProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, DeformVosPipeline, pt_model=AutoModel, type="video")
DeformVosConfig.has_installed_pipeline = True

__all__ = [
    "DeformVosConfig",
    "DeformVosImageProcessor",
    "DeformVosInferenceSession",
    "DeformVosModel",
    "DeformVosOutput",
    "DeformVosPipeline",
    "DeformVosPreTrainedModel",
    "DeformVosProcessor",
    "DeformVosVideoOutput",
]
