"""The topologies, one builder each: the import paths that a Serve config names."""

from ray.serve import Application

from app.services import decide_grounding, decide_planning
from app.settings import Device, Settings
from deployments.batches import batches_deployment
from deployments.ingress import Ingress
from deployments.llm import LLM
from deployments.placement import business_options, choose_device, llm_options
from deployments.retriever import Retriever
from deployments.versions import versioned

# The branches of the settings that a deployment reads, and whose change restarts it.
KNOWLEDGE = ("data_dir", "seed", "embedding", "chunking", "store", "retrieval", "reranking", "api", "logging")
BUSINESS = ("data_dir", "planning", "answer", "profiles", "api", "batch", "access", "retrieval", "logging")
# Beside these, of `llm` the chat template, which is part of what a collection is stamped with; and of `store` the name
# of the collection that a request means when it names none, which the Ingress checks against the key.
MODEL = ("data_dir", "llm", "logging")


def monolith(settings: Settings) -> Application:
    """All in one process: a laptop, one GPU box, debugging."""
    device = choose_device(settings)
    ingress = Ingress.options(ray_actor_options=llm_options(device, num_cpus=0.8))
    return versioned(ingress, settings, device).bind(settings, device)


def two_tier(settings: Settings) -> Application:
    """Business logic with retrieval on CPUs, the LLM apart."""
    device = choose_device(settings)
    own = _with_chat_template(_decided(settings, device).only(*BUSINESS, *KNOWLEDGE), settings)
    ingress = Ingress.options(ray_actor_options=business_options(device, num_cpus=0.5))
    return versioned(ingress, own, "LLM").bind(own, llm=_llm(settings, device))


def three_tier(settings: Settings) -> Application:
    """API, retrieval, LLM and batches each apart, each scaled by itself."""
    device = choose_device(settings)
    own = _with_collection_name(_decided(settings, device).only(*BUSINESS), settings)
    knowledge = _with_chat_template(settings.only(*KNOWLEDGE), settings)
    # It holds nothing that two could not hold: the new replicas start before the old ones end.
    ingress = Ingress.options(ray_actor_options=business_options(device, num_cpus=0.2), max_surge_percent=100)
    retriever = Retriever.options(ray_actor_options=business_options(device, num_cpus=0.4))
    batches = batches_deployment(own).options(ray_actor_options=business_options(device, num_cpus=0.1))
    parts = {"retriever": versioned(retriever, knowledge).bind(knowledge), "llm": _llm(settings, device)}
    return versioned(ingress, own, "Retriever", "LLM", "Batches").bind(
        own, **parts, batches=versioned(batches, own, "Retriever", "LLM").bind(own, **parts)
    )


def _llm(settings: Settings, device: Device) -> Application:
    model = settings.only(*MODEL)
    llm = LLM.options(ray_actor_options=llm_options(device, num_cpus=0.4))
    return versioned(llm, model, device).bind(model, device)


def _with_chat_template(own: Settings, settings: Settings) -> Settings:
    llm = own.llm.model_copy(update={"chat_template": settings.llm.chat_template})
    return own.model_copy(update={"llm": llm})


def _with_collection_name(own: Settings, settings: Settings) -> Settings:
    store = own.store.model_copy(update={"collection": settings.store.collection})
    return own.model_copy(update={"store": store})


def _decided(settings: Settings, device: Device) -> Settings:
    """Decide what follows from the LLM's device, so that an Ingress without the LLM need not know it."""
    grounding = decide_grounding(settings, device)
    answer = settings.answer.model_copy(update={"grounding": grounding})
    return settings.model_copy(update={"answer": answer, "planning": decide_planning(settings, device)})
