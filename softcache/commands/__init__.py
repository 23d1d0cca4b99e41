"""One file per verb. A new verb is a new file, made like its neighbours, and a line here."""

# verb -> the module that holds its VERB; none is imported before it is asked for
VERBS = {
    "demo": "softcache.commands.demo",
    "plan": "softcache.commands.plan",
    "dump": "softcache.commands.dump",
    "train": "softcache.commands.train",
    "eval": "softcache.commands.eval",
    "shrink": "softcache.commands.shrink",
    "export": "softcache.commands.export",
    "reproduce": "softcache.commands.reproduce",
    "losses": "softcache.commands.losses",
    "inspect": "softcache.commands.inspect",
    "views": "softcache.commands.views",
    "verify": "softcache.commands.verify",
    "repair": "softcache.commands.repair",
    "subset": "softcache.commands.subset",
    "merge": "softcache.commands.merge",
    "diff": "softcache.commands.diff",
    "card": "softcache.commands.card",
    "push": "softcache.commands.push",
    "pull": "softcache.commands.pull",
    "sign": "softcache.commands.sign",
    "store": "softcache.commands.store",
    "completion": "softcache.commands.completion",
    "help": "softcache.commands.help",
}
