"""Common English words that form the keys of needles (`data.tasks.needle`): an adjective and a noun."""

_ADJECTIVES = """
amber ancient autumn bitter black blue bold brave bright broad broken bronze calm careful cheerful clean clear clever
cold common cool copper coral cosmic cotton crimson crisp curious daily damp dark deep dense distant double dry dusty
eager early earnest eastern easy elder electric empty fair faithful famous fast fearless final fine firm first flat
fond fragile free fresh frozen full gentle giant glad golden grand grave green grey happy hard heavy hidden high
hollow honest huge humble icy idle inner iron ivory jolly keen kind large late lazy light little lively lonely long
loose loud loyal lucky mellow merry mighty mild misty modern modest narrow neat new noble northern odd old open orange
outer pale patient plain polite proud purple quick quiet rapid rare ready red rich rough round royal rustic safe
scarlet secret sharp short silent silver simple slow small smooth soft solid southern spare steady steep still strange
strong sudden sunny sweet swift tall tame tender thick thin tidy tiny true velvet violet vivid warm western white wide
wild wise wooden yellow young
"""

_NOUNS = """
acorn anchor apple arrow autumn badge bakery barn basin basket beacon bell bench bird blanket boat bottle bridge brook
brush bucket button cabin candle canyon carpet castle cave cellar chain chair chapel chimney circle cliff clock cloud
coat coin compass corner cottage cradle crane crown cup curtain desert desk diamond dog door drum eagle engine falcon
farm feather fence field finger flag flame flower flute forest fork fountain fox garden gate glacier glove goose grain
hammer harbor harvest hat hawk hill horn horse house island jacket jar journey kettle key kitchen kite ladder lake
lamp lantern leaf letter library lion lock maple market meadow mill mirror moon mountain needle nest oak ocean office
orchard otter owl paddle palace paper pearl pebble pencil piano pillow pine planet plate pond prairie quilt rabbit
raft rain raven ribbon ring river road robin roof rope rose saddle sail school shadow shell ship shoe shore spoon
spring square stable star station statue stone storm stream street table temple tent thread tiger tower train tree
tunnel valley village violin wagon wall watch water whale wheel willow window winter wolf
"""

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
