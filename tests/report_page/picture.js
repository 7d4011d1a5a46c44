// What a picture is made of, worked out by the browser, which can read its own. PICTURE is a PNG in base64.
(async () => {
  const picture = new Image();
  picture.src = "data:image/png;base64,PICTURE";
  await picture.decode();
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const paint = canvas.getContext("2d");
  paint.drawImage(picture, 0, 0);
  const { data } = paint.getImageData(0, 0, picture.width, picture.height);
  const colours = new Set(), inked = new Set();
  let coloured = 0;
  for (let i = 0; i < data.length; i += 4) {
    const [red, green, blue] = [data[i], data[i + 1], data[i + 2]];
    colours.add((red << 16) | (green << 8) | blue);
    const corner = red === data[0] && green === data[1] && blue === data[2];
    if (!corner) inked.add(Math.floor(i / 4 / picture.width));
    coloured += Math.max(red, green, blue) - Math.min(red, green, blue) > 60;
  }
  return {
    width: picture.width, corner: [data[0], data[1], data[2]], colours: colours.size,
    lines: inked.size / picture.height, coloured: 4 * coloured / data.length,
  };
})()
