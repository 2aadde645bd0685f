from cpt_jax import config


def get_config():
  c = config.default()
  c.model.scratch = "configs/architectures/llama3_8b.json"
  c.model.remat = "full"
  c.data.row_len = 4096
  c.train.batch_rows = 16
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
