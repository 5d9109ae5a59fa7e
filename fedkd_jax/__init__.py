"""fedkd_jax: a vectorised simulator of FedKD. Public names, in reading order."""

from fedkd_jax.types import (
    Aggregator,
    Algorithm,
    Batch,
    ClientSource,
    ClientState,
    Codec,
    Factors,
    FederatedData,
    History,
    LocalResult,
    LossTerms,
    LowRank,
    Model,
    Outputs,
    Payload,
    RoundInfo,
    ServerState,
    State,
    Turn,
)
from fedkd_jax.losses import (
    cross_entropy,
    hidden_loss,
    kl_divergence,
    layer_map,
    mutual_distillation,
    per_example,
    task_terms,
)
from fedkd_jax.svd import (
    energy_threshold,
    factorise,
    matrix_view,
    reconstruct,
    retained_rank,
    truncated_svd,
    weighted_product,
)
from fedkd_jax.codecs import (
    chain,
    error_feedback,
    identity_codec,
    payload_bytes,
    payload_floats,
    power_codec,
    quantise,
    server_sketch_codec,
    sketch_codec,
    spectrum_codec,
    svd_codec,
    top_k,
)
from fedkd_jax.local import local_steps
from fedkd_jax.aggregate import (
    clip_update,
    coordinate_median,
    example_weight,
    fixed_weight,
    trimmed_mean,
    uniform_weight,
)
from fedkd_jax.attacks import attacked, hostile_share, label_flip, scaled, sign_flip
from fedkd_jax.privacy import fixed_mean, privacy_spent, private_mean, private_send
from fedkd_jax.cohort import client_key, put, sample_cohort, take
from fedkd_jax.participation import Participation, available_by, available_with, unreliable
from fedkd_jax.parallel import Layout, client_mesh, map_clients
from fedkd_jax.rest import stochastic_round
from fedkd_jax.rounds import Round, federated_round
from fedkd_jax.algorithms import (
    centralised,
    fedavg,
    feddropout,
    fedkd,
    fedpaq,
    fedprox,
    fetchsgd,
    fml,
    keep_units,
    local_only,
    mutual_learning,
    scaffold,
)
from fedkd_jax.wire import Channel, WireError
from fedkd_jax.transport import Transport
from fedkd_jax.population import init_state
from fedkd_jax.stores import DiskStore, HostStore
from fedkd_jax.evaluate import evaluate, evaluate_seeds
from fedkd_jax.metrics import Metric, accuracy, binary_f1, entity_f1, ranking, token_accuracy
from fedkd_jax.simulate import simulate, simulate_seeds
from fedkd_jax.checkpoint import Checkpoints, Stopped, load_state, save_state
from fedkd_jax.models import (
    TransformerConfig,
    cnn,
    compute_in,
    freeze,
    from_nnx,
    language_model,
    load_bert,
    mlp,
    recommender,
    rematerialise,
    tagger,
    text_classifier,
    with_pretrained,
)
