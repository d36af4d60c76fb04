"""Tables of ``trellis``: int8 values in units of 1/32, by width; see ``trellis.design``."""

from __future__ import annotations

import numpy as np

_HEX = {
    1: (  # mean square error 0.30464
        "12c50ef6e424f4f409eefc04c42df608fc17f926f51fe40af800f92e09f2c4f3"
        "3807201df7d1e8f1fe1139e90eefe2f328f1f8190af8fd04cffbd2f6ec0e2422"
        "f41ef20f08f6280b1920e30ee2fa0f2f0ef6fddeed1c0febf20eea132a00cff3"
        "ec0e39ea1707e61b11e2bbeedd1115fbfa391de10625f60404d00114c6e519f0"
        "df042002f8e7143914ecd30cf9dc11df32effe35d8030be0fc0cdc0d210e23f8"
        "04e30df53027e2ed06f41ee904f5111ffe14e1d04705ff18f9061efe28f7e4f7"
        "03e0e7fb11c903e4e60cf610072ade1ae01706fe08df451f25ef18f2dbc20009"
        "e929ef1500fd1303eb0fcf1205f4fe27e40f16e815d9f1d3ea350dd3fd16e918"
    ),
    2: (  # mean square error 0.07812
        "c3ef2005071cf1d6071eefc4d4f224044513e4fcf9de0f2bfae4104d2c10e1fb"
        "e0fa2b0f112ffbe21135f9e3e1fb4b102105d3f0f0ce071ff0d5061d2207bdef"
        "1e05cbeeefb4061df2d6061f1c05cbeee1fa3210112bfae21135fbe3e1f92d0f"
        "3410ddfafee21231fbe10f273a0fdffaafed1d05051df1d00722eec7d2ef1f05"
        "eec8051d2007d9f22106a1eff2d2071e1340fbe2e2f93a0fe0fa2910103ffbe2"
        "fae40d283510e2fa4b12e0fbfce3122e051df0d3bcef2105c8f11c04071ef0d7"
        "061df0ced0ee2005d4f32006071df0b8fbe211334211e1fa2d0fe3fafbe71136"
        "0d2ff9e3e4fb5f12e2fb3d0f112ef9e2efce061d1f03cff21f05bdf0f1cc051e"
    ),
    3: (  # mean square error 0.02005
        "c30feb3203db1cf814d149f1e408fd2403dc1cf8c40eec2be408fc2414cb58f1"
        "1bf803dcea2fb30efd26e3084cf115cdeb31a70e1df803db3ff215d2fe24e409"
        "03db1bf7c40eeb2fe408fd2515ce40f2bb0feb3103db1cf714d13bf2e508fd24"
        "ec2dc50e1cf803dc3cf214d2fd24e3081cf702dcec2eb70efd24e40953f114d1"
        "0fb72eebdb03f81dd315f14008e423fddb03f71c0ec12deb08e424fed415f23a"
        "f71cdc0231ec0ebd24fd08e4f13dd0152eec0fc5f81cdd03f13bd11423fd08e4"
        "dc03f81c0f9730eb08e425fdd214f23b0ec533ecdc03f81ccf15f14a08e325fd"
        "2eeb0ec5f71cdc03f268cf1525fd08e4f71ddb0334eb0ead24fd09e4f246d115"
    ),
    4: (  # mean square error 0.00538
        "c6212be5ec070dfcdd4419d4f71302f207eafc0d20b4e22913f6f00236d7cd19"
        "37ddd21912f6f10121a6e42a06eafc0cf71402f2d9471ccdec080efcb92635e4"
        "02f0f61319d1da360dfcea0729e2ac21d41a4ddef20214f7e53022c4fc0d07ec"
        "fc0e07ece52b24c3f20114f7cf1c4bdb2de4c3230cfcea071accdc5401f0f613"
        "24bde02e07e8fc0c39d6c91911f6ef01ea080efc8d2130e2f71402f0da3f1ad1"
        "dd431cd4f71401f1c02633e5eb070efc12f6ef023cdad01807e8fc0c1f9de12f"
        "f10215f7ce1b3bd7fc0e07ebe23025b619c8d86d01eff6112be0bb210cfce806"
        "0cfce80729e1bf1f02eff61117cad75de53125b0fc0e07ebc81d3fdcf10114f7"
    ),
}

TABLES = {bits: np.frombuffer(bytes.fromhex(text), np.int8) for bits, text in _HEX.items()}
